"""Where the checkout keeps its samples and its results. Paths that a user types are relative to where they type."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "dataset" / "samples"
OUTPUT = ROOT / "output"
EMBEDDED_BASE = OUTPUT / "bases" / "tiny-qwen3"
