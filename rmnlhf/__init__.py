"""Reward Modeling from Natural Language Human Feedback: from human critiques to a generative reward model."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository: notebooks run from here
