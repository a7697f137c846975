"""The tracers: what each is called, in tables, in headers and in the codes of DICOM; one name for each.

The name is nuclide and agent ("68Ga-PSMA", "11C-choline"). Agents of one target that are read alike have one name: all
PSMA ligands are PSMA. A text that is none of these is no tracer, whatever it says: it may say who the patient is.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import Dataset

# A tracer is compared by its letters and digits alone: "[18F]F-PSMA-1007" is "18ffpsma1007" here. Nuclides also with
# the element in front, as the USAN has it: "gallium Ga 68 gozetotide", "fludeoxyglucose F 18".
_NUCLIDES = {
    "18F": "(?:al)?(?:18f|f18|18fluorine?|fluorinef?18|18fluor|fluorf?18)(?:alf|f)?|alf",
    "68Ga": "(?:68ga|ga68|68gallium|gallium(?:ga)?68)(?:ga)?",
    "11C": "(?:11c|c11|11carbon|carbonc?11|11kohlenstoff|kohlenstoff11)c?",
    "64Cu": "(?:64cu|cu64|64copper|copper(?:cu)?64|64kupfer|kupfer64)(?:cu)?",
    "61Cu": "(?:61cu|cu61|61copper|copper(?:cu)?61)(?:cu)?",
    "89Zr": "(?:89zr|zr89|89zirconium|zirconium(?:zr)?89|89zirkonium|zirkonium89)(?:zr)?",
    "124I": "(?:124i|i124|124iodine|iodinei?124|124iod|iod124|124jod|jod124)",
    "13N": "(?:13n|n13|13nitrogen|nitrogenn?13)n?",
    "15O": "(?:15o|o15|15oxygen|oxygeno?15)o?",
    "82Rb": "(?:82rb|rb82|82rubidium|rubidium(?:rb)?82)",
    "44Sc": "(?:44sc|sc44)",
    "86Y": "(?:86y|y86)",
    "90Y": "(?:90y|y90|90yttrium|yttriumy?90)",
}
# Agent: its spellings and brand names, its nuclides, the first of which is meant where nothing says another; with ""
# first nothing is meant. The order counts: a spelling is looked for from the top.
_AGENTS: list[tuple[str, str, str]] = [
    ("FDG",
     "2?fdg|18fdg|2?(?:fluoro?|flu)de[sz]?oxyglu[ck]ose|2?deoxy2(?:18f)?fluorod?glu[ck]ose|fluorodesoxiglucosa",
     "18F"),
    ("PSMA", "psma1007|dcfpyl|piflufolastat|pylarify|rhpsma(?:7|73|10|101)?|flotufolastat|posluma|dcfbc|j?kpsma7",
     "18F 68Ga"),
    ("PSMA", "psma(?:11|617|it|hbedcc|11hbedcc|hbedcc11)|hbedccpsma(?:11)?|gozetotide|illuccix|locametz|gozellix",
     "68Ga 18F 64Cu 89Zr 44Sc 86Y"),
    ("PSMA", "psma", " 18F 68Ga 64Cu 89Zr 44Sc 86Y"),
    ("DOTATATE", "dota(?:tyr3?)?(?:octreo)?tate|oxodotreotide|netspot|detectnet|sartate|gatate",
     "68Ga 64Cu 18F 61Cu 44Sc"),
    ("DOTATOC", "dotatoc|dotad?phe1?tyr3?octreotide|edotreotide|dotaoctreotide|somakittoc", "68Ga 64Cu 18F"),
    ("DOTANOC", "dotanoc|dota1?nal3octreotide", "68Ga 64Cu"),
    ("NOTA-octreotide", "nota?octreotide|notatoc", "18F 68Ga"),
    ("SSTR", "sitate|dotajr11|satoreotide|nodagajr11|nodagalm3|dotalm3", " 18F 68Ga 64Cu"),
    ("FES", "fes|16(?:a|alpha)fluoro17(?:b|beta)o?estradiol|fluoro?o?estradiol"
     "|cerianna", "18F"),
    ("FDHT", "fdht|fluorodihydrotestosterone", "18F"),
    ("choline", "choline?(?:chloride)?", "11C 18F"),
    ("choline", "f(?:e|m)?choline|fluoro?(?:methyl|ethyl)?choline?(?:chloride)?|fch|fec|fmc", "18F"),
    ("fluciclovine", "fluciclovine|facbc|antifacbc|anti1amino3fluorocyclobutane1carboxylicacid|axumin", "18F"),
    ("FLT", "flt|(?:3)?(?:deoxy3)?fluoro?(?:3deoxy)?thymidine?|alovudine|thymidine", "18F"),
    ("FDOPA", "f?dopa|6?fluoro?l?dopa|fluorodopa|6?lfluoro?dopa|6?fluorolevodopa", "18F"),
    ("NaF", "naf|sodiumfluoride|natriumfluorid|fluoruredesodium|fluoride", "18F"),
    ("FAPI", "(?:dota|nota)?fapi(?:0?2|0?4|34|46|74)?|fapi", "68Ga 18F 64Cu"),
    ("FET", "fet|o?2?fluoro?ethyl?l?tyrosine?|fluoroethyltyrosine?|fluorethyltyrosin", "18F"),
    ("FMISO", "f?miso|fluoro?misonidazole?", "18F"),
    ("FAZA", "faza|fluoroazomycinarabinoside", "18F"),
    ("methionine", "l?(?:methyl)?methionine?|met", "11C"),
    ("acetate", "acetate?|acetat", "11C"),
    ("PiB", "pib|pittsburghcompoundb", "11C"),
    ("florbetapir", "florbetapir|amyvid|av45", "18F"),
    ("florbetaben", "florbetaben|neuraceq", "18F"),
    ("flutemetamol", "flutemetamol|vizamyl", "18F"),
    ("flortaucipir", "flortaucipir|tauvid|av1451|t807", "18F"),
    ("flurpiridaz", "flurpiridaz|flyrcado", "18F"),
    ("pentixafor", "pentixafor|boclatixafortide", "68Ga"),
    ("exendin-4", "(?:nota|dota|nodaga)?exendin4?", "68Ga 64Cu"),
    ("girentuximab", "girentuximab|tlx250(?:cdx)?", "89Zr"),
    ("trastuzumab", "trastuzumab", "89Zr 64Cu"),
    ("MIBG", "mibg|metaiodobenzylguanidine|iobenguane", "124I"),
    ("MFBG", "mfbg|metafluorobenzylguanidine", "18F"),
    ("iodide", "(?:sodium)?iodide|nai|natriumiodid|iod|iodine|jod", "124I"),
    ("ammonia", "ammonia|nh3|ammoniak", "13N"),
    ("water", "water|h2o|oxygenwater", "15O"),
    ("rubidium", "rubidium(?:chloride)?|rbcl|cardiogen", "82Rb"),
    ("microspheres", "(?:resin|glass)?(?:micro)?spheres|sirspheres|sirt|therasphere", "90Y"),
]  # fmt: skip
_LONGEST = 80  # characters of a text that are looked at
_LABEL = re.compile(r"[\[(]\s*\^?(?:\d{2,3}\^?-?[A-Z][a-z]?|[A-Z][a-z]?-?\d{2,3})\s*[\])]")
_FILLER = re.compile(r"\b(?:injection|injectable|solution|inj|i\.?v\.?|pet|tracer|usp|diagnostic|kit)\b", re.I)


def tracer_name(text: str | None, nuclide: str = "") -> str | None:
    """The name of the tracer that a text means, None if it is none that is known.

    Args:
        nuclide: what else is known of it ("18F"), taken where the text says none and the agent comes with it.
    """
    text = (text or "")[:_LONGEST]
    label = _LABEL.search(text)  # also in the middle: 6-[18F]fluoro-L-DOPA
    key = _letters(_FILLER.sub(" ", _LABEL.sub("", text)))
    for agent, spellings, nuclides in _AGENTS if key else ():
        if match := _pattern(spellings).fullmatch(key):
            said = _nuclide(_letters(label[0])) if label else _nuclide(match["before"] or match["after"] or "")
            known = nuclides.split(" ")
            which = said or (nuclide if nuclide in known else known[0])
            return f"{which}-{agent}" if which else agent
    return None


@cache
def _pattern(spellings: str) -> re.Pattern:
    """An agent, once or twice ("FDG -- fluorodeoxyglucose"), with its nuclide before or behind it; nothing in it can be
    repeated without end, for the text is anybody's."""
    nuclide = "|".join(_NUCLIDES.values())
    element = "(?:f|ga|cu|zr|c|n|o|y)?"
    return re.compile(f"(?P<before>{nuclide})?{element}(?:{spellings})(?:{spellings})?(?P<after>{nuclide})?")


def tracer_of(header: Dataset) -> str | None:
    """The tracer of a PET by RadiopharmaceuticalInformationSequence (0054,0016): by its code (PS3.16 CID 4021), by the
    meaning that the header gives it, or by its text, each only if it is a tracer that is known."""
    from nnUNet_raw_conversion.dicom.radionuclide import radionuclide

    for item in header.get("RadiopharmaceuticalInformationSequence") or ():
        found = radionuclide(item) or ""  # "F-18"
        nuclide = "".join(reversed(found.split("-")))
        of_code = list(item.get("RadiopharmaceuticalCodeSequence") or ())
        meanings = [_coded(str(c.get("CodeValue") or ""), str(c.get("CodingSchemeDesignator") or "")) for c in of_code]
        texts = [*meanings, *(str(c.get("CodeMeaning") or "") for c in of_code)]
        for text in filter(None, [*texts, str(item.get("Radiopharmaceutical") or "")]):
            if tracer := tracer_name(text, nuclide) or _of_the_standard(text):
                return tracer
    return None


def _nuclide(key: str) -> str:
    return next((name for name, pattern in _NUCLIDES.items() if re.fullmatch(pattern, key)), "") if key else ""


def _letters(text: str) -> str:
    """Letters and digits alone, in lower case, umlauts as two letters."""
    text = text.lower().translate(str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss"}))
    return re.sub("[^a-z0-9]", "", text)


@cache
def _standard() -> dict[tuple[str, str], str]:
    """The meanings of CID 4021 by code and scheme, as pydicom has them."""
    from pydicom.sr.codedict import codes

    return {(code.value, code.scheme_designator): code.meaning for code in codes.cid4021.concepts.values()}


def _coded(value: str, scheme: str) -> str:
    """The standard's own words for a code, also one of the older SRT; "" if it is none of CID 4021."""
    from pydicom.sr.coding import Code

    if (value, scheme) in _standard() or not value:
        return _standard().get((value, scheme), "")
    older = Code(value, scheme, "")  # equal to SNOMED CT's code of the same concept
    return next((said for (code, of), said in _standard().items() if older == Code(code, of, said)), "")


def _of_the_standard(text: str) -> str | None:
    """A tracer of CID 4021 that has no name of ours, called by the standard's words: 11C-carfentanil."""
    for meaning in _standard().values():
        if _letters(meaning) == _letters(text):
            parts = re.fullmatch(r"(.*?) (?:\^(\d+)\^([A-Z][a-z]?)|([A-Z][a-z]?)\^(\d+)\^)", meaning)
            return f"{parts[2] or parts[5]}{parts[3] or parts[4]}-{parts[1].lower()}"
    return None
