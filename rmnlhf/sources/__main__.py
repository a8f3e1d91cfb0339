"""python -m rmnlhf.sources: fetch the data (see fetch.py)."""

from rmnlhf.sources.fetch import main

raise SystemExit(main())
