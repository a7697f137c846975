"""Pictures to look at: PET as maximum intensity projections with lesions, CT slices, and a page of all of them.

Arrays are (z, y, x) = (foot to head, front to back, right to left of the patient), as images in LPS orientation give
them; spacings are (z, y, x) in mm. There is no state shared by figures (no pyplot), so threads and processes may draw.
"""

from __future__ import annotations

import html
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_fratmae.base.files import renamed

LESION = (0.9, 0.1, 0.1)
SUV_WINDOW, HU_WINDOW = (0.0, 7.0), (-200.0, 300.0)  # SUV as nuclear physicians read it; soft tissue
CORONAL, SAGITTAL = 1, 2
""" The axis along which such a view looks."""


def save_figure(figure: Figure, path: Path, tight: bool = True) -> None:
    """Write a PNG of 110 dots an inch under a temporary name and rename it; `tight` cuts the empty rim off (slow)."""
    FigureCanvasAgg(figure)
    with renamed(path) as partial:
        figure.savefig(partial, dpi=110, bbox_inches="tight" if tight else None, facecolor="white", format="png")


def show_plane(axes: Axes, plane: np.ndarray, spacing: tuple[float, float, float], view: int, **how: object) -> None:
    """A plane (z, y or x) or an overlay (z, y or x, RGBA) in mm with the head up.

    Coronal (`view` 1): the patient's right is on the viewer's left. Sagittal (2): the front is on the viewer's left.
    """
    axes.imshow(plane, origin="lower", aspect=spacing[0] / spacing[3 - view], **how)
    axes.set_xticks([])
    axes.set_yticks([])


def show_mip(axes: Axes, suv: np.ndarray, spacing: tuple[float, float, float], view: int = CORONAL) -> None:
    """Maximum intensity projection of a PET in SUV, dark = hot."""
    low, high = SUV_WINDOW
    show_plane(axes, suv.max(axis=view), spacing, view, cmap="gray_r", vmin=low, vmax=high)


def show_ct(axes: Axes, hu: np.ndarray, spacing: tuple[float, float, float], index: int) -> None:
    """Coronal slice `index` of a CT in HU."""
    low, high = HU_WINDOW
    show_plane(axes, hu[:, index], spacing, CORONAL, cmap="gray", vmin=low, vmax=high)


def overlay(
    axes: Axes,
    mask: np.ndarray,
    colour: tuple[float, float, float],
    spacing: tuple[float, float, float],
    view: int = CORONAL,
    alpha: float = 0.75,
) -> None:
    """A projected mask in one colour over a projection."""
    flat = mask.any(axis=view)
    picture = np.zeros((*flat.shape, 4), np.float32)
    picture[flat] = (*colour, alpha)
    show_plane(axes, picture, spacing, view, interpolation="nearest")


def coronal_slice(hu: np.ndarray, lesions: np.ndarray | None = None) -> int:
    """The slice to show: the middle one of the lesions, or else of the body (above -300 HU)."""
    shown = lesions.any(axis=(0, 2)) if lesions is not None and lesions.any() else (hu > -300).any(axis=(0, 2))
    where = np.flatnonzero(shown)
    return int(np.median(where)) if where.size else hu.shape[1] // 2


def draw_case(
    path: Path,
    title: str,
    suv: np.ndarray,
    hu: np.ndarray | None,
    lesions: np.ndarray | None,
    spacing: tuple[float, float, float],
) -> None:
    """One case as a PNG: coronal and sagittal PET MIP with lesions in red, and a coronal CT slice, all on one scale.

    Args:
        suv, hu, lesions: PET, CT (None: there is none) and boolean mask (None: not segmented) of one shape.
    """
    (y, x), hottest = _body_box(suv, spacing), float(suv.max())
    suv, hu, lesions = (None if a is None else a[:, y, x] for a in (suv, hu, lesions))
    height, depth, width = np.array(suv.shape) * spacing
    figure, (coronal, sagittal, ct) = _panels(title, height, {
        f"PET MIP coronal\nSUV {SUV_WINDOW[0]:g} to {SUV_WINDOW[1]:g}, maximum {hottest:.1f}": width,
        f"PET MIP sagittal\nSUV {SUV_WINDOW[0]:g} to {SUV_WINDOW[1]:g}": depth,
        f"CT coronal slice\nHU {HU_WINDOW[0]:g} to {HU_WINDOW[1]:g}": width,
    })  # fmt: skip
    for axes, view, sides in ((coronal, CORONAL, "RL"), (sagittal, SAGITTAL, "AP")):
        show_mip(axes, suv, spacing, view)
        if lesions is not None:
            overlay(axes, lesions, LESION, spacing, view, alpha=0.6)
        name_sides(axes, sides)
    if hu is not None:
        show_ct(ct, hu, spacing, coronal_slice(hu, lesions))
        name_sides(ct, "RL")
    else:
        ct.set_axis_off()
        ct.text(0.5, 0.5, "no CT", ha="center", va="center", transform=ct.transAxes)
    save_figure(figure, path, tight=False)


def _panels(title: str, height: float, widths: dict[str, float]) -> tuple[Figure, list[Axes]]:
    """Axes side by side for pictures of one height and these widths (mm) by their titles, all on one scale.

    Laid out by hand, in inches: letting matplotlib find a layout takes longer than all the rest.
    """
    gap, top, least = 0.12, 0.75, 1.9  # no panel is narrower than its title
    scale = min(6.5 / height, 11 / sum(widths.values()))
    inches = [max(width * scale, least) for width in widths.values()]
    size = (sum(inches) + (len(inches) + 1) * gap, height * scale + top + gap)
    figure, left, panels = Figure(size), gap, []
    figure.text(gap / size[0], 1 - 0.1 / size[1], title, fontsize=10, weight="bold", va="top")
    for name, width in zip(widths, inches, strict=True):
        panels.append(figure.add_axes((left / size[0], gap / size[1], width / size[0], height * scale / size[1])))
        panels[-1].set_title(name, fontsize=8, linespacing=1.4)
        left += width + gap
    return figure, panels


def name_sides(axes: Axes, sides: str) -> None:
    """Letters of the patient's sides on the left and right of a panel."""
    for side, place, align in zip(sides, (0.02, 0.98), ("left", "right"), strict=True):
        axes.text(place, 0.01, side, ha=align, va="bottom", fontsize=9, color="tab:orange", transform=axes.transAxes)


def _body_box(suv: np.ndarray, spacing: tuple[float, float, float]) -> tuple[slice, slice]:
    """Where there is uptake (above SUV 0.3) along y and x, and 20 mm around: half of a PET's width is air."""
    box = []
    for axis, profile in ((1, suv.max(axis=0).max(axis=1)), (2, suv.max(axis=0).max(axis=0))):
        where, rim = np.flatnonzero(profile > 0.3), round(20 / spacing[axis])
        if not where.size:
            where = np.array((0, profile.size))
        box.append(slice(max(int(where[0]) - rim, 0), int(where[-1]) + rim + 1))
    return box[0], box[1]


STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1300px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
th { position: sticky; top: 0; background: Canvas; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.failed td { background: #d332; }
tr.note td { background: #da22; }
figure { margin: 0 0 2.5rem; }
img { max-width: 100%; background: white; }
"""


def index_page(title: str, rows: list[dict]) -> str:
    """A page (HTML that loads nothing from elsewhere) of all cases: what was used, warnings and errors in a table,
    failed cases first and then those with notes, and the pictures `<case_id>.png` that lie beside the page.

    Args:
        rows: one a case with case_id, status ("done" or "failed"), part, used (dict), notes (list), error, grid,
            lesion_ml, suv_max and seconds (each may be None), as `conversion.convert_study` makes them.
    """
    rows = sorted(rows, key=lambda row: (row["status"] != "failed", not row["notes"], row["case_id"]))
    done = [row for row in rows if row["status"] == "done"]
    noted = sum(bool(row["notes"]) for row in done)
    kinds = [f"{len(done)} done", f"{len(rows) - len(done)} failed", f"{noted} with notes"]
    head = "".join(f"<th>{name}</th>" for name in ("case", "part", "what was used", "warnings and errors", "grid",
                                                   "lesions, ml", "highest SUV", "seconds"))  # fmt: skip
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n<p>{', '.join(kinds)}</p>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{''.join(map(_table_row, rows))}</tbody></table>\n"
        f"{''.join(map(_figure, done))}</body></html>\n"
    )


def _table_row(row: dict) -> str:
    failed = row["status"] == "failed"
    name = html.escape(row["case_id"])
    link = name if failed else f"<a href='#{name}'>{name}</a>"
    used = "<br>".join(html.escape(f"{what}: {value}") for what, value in row["used"].items())
    said = "<br>".join(html.escape(text) for text in [f"failed: {row['error']}"] * failed + row["notes"])
    numbers = "".join(
        f"<td class='number'>{'' if row[key] is None else format(row[key], '.1f')}</td>"
        for key in ("lesion_ml", "suv_max", "seconds")
    )
    kind = "failed" if failed else "note" if row["notes"] else ""
    texts = "".join(f"<td>{text}</td>" for text in (link, row["part"], used, said, html.escape(row["grid"] or "")))
    return f"<tr class='{kind}'>{texts}{numbers}</tr>\n"


def _figure(row: dict) -> str:
    name = html.escape(row["case_id"])
    source = html.escape(quote(f"{row['case_id']}.png"))
    return f"<figure id='{name}'><img loading='lazy' src='{source}' alt='PET and CT of {name}'></figure>\n"
