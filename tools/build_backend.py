"""The PEP 517 build backend: setuptools', asking for torch only where there is none to build on.

The extension needs torch's headers. Were torch a plain build requirement, pip would download a
second one, several gigabytes, into every isolated build. setup.py finds the torch of the
environment that pip runs in instead; only where that environment has none is one requested.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks pip calls)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# Any torch >= 2.11 serves: the library is built against its stable ABI.
TORCH = "torch==2.13.0"


def _missing_torch() -> list[str]:
    if os.environ.get("LLMOPS_BUILD") == "0":
        return []
    folders = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    found = any((Path(folder) / "torch" / "include").is_dir() for folder in folders)
    return [] if found else [TORCH]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_torch()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_torch()
