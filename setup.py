"""Package metadata. The newest versions that were tested stand in requirements.txt.

The lower bounds are the oldest versions with which tests were run, together and with Python 3.11:
torch 2.6.0, numpy 1.26.0, nibabel 5.3.0, scikit-image 0.24.0, scipy 1.11.1, pillow 10.3.0, tqdm
4.65.0, pydicom 3.0.1, matplotlib 3.8.0 and tensorboard 2.14.0. Of older ones, torch cannot compile
the networks and runs code from some files of weights, pillow ends in a traceback at a link that
points to itself, and pydicom 3.0.0 asks a server for example files.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="guided-diffusion-segmentation",
    version="0.1.0",
    description="Diffusion-based medical image segmentation: train, draw ensembles, fuse, score",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords=[
        *("medical image segmentation", "diffusion model", "DDPM", "DDIM", "DPM-Solver"),
        *("uncertainty", "ensemble", "weak supervision", "MedSegDiff"),
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["guided_diffusion*"]),
    package_data={
        "guided_diffusion": ["py.typed", "weights/*.safetensors", "weights/*.md"],
        "guided_diffusion.report": ["report.html", "report.css", "report.js"],
    },
    entry_points={"console_scripts": ["guided-diffusion = guided_diffusion.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26,<3",
        "nibabel>=5.3,<6",
        "scikit-image>=0.24,<1",
        "scipy>=1.11.1,<2",
        "pillow>=10.3",
        "tqdm>=4.65,<5",
        "safetensors>=0.4.3,<1",
        "pyyaml>=6,<7",
    ],
    extras_require={
        "dicom": ["pydicom>=3.0.1,<4"],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.14"],
        "visdom": ["visdom>=0.2.4"],
    },
)
