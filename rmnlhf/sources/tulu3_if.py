"""Tulu 3 personas, instruction following: a response that meets all constraints against one that misses some.

No critiques. meta: constraints, models [chosen, rejected]."""

from __future__ import annotations

from pathlib import Path

from rmnlhf import sources


def fields(data_dir: Path, name: str):
    """For each row (chosen and rejected are message lists that end with the response): the fields of its pair."""
    for _, row in sources.rows(name, data_dir):
        chosen, rejected = row["chosen"], row["rejected"]
        if not chosen or not rejected:
            yield "a response is missing"
            continue
        yield {
            "id": f"tulu3_if-{row['id']}",
            "group": row["prompt"],
            "context": chosen[:-1] or [{"role": "user", "content": row["prompt"]}],
            "response_a": chosen[-1]["content"],
            "response_b": rejected[-1]["content"],
            "label": "A",
            # upstream's column is spelt "chonsen_model"
            "meta": {
                "constraints": row.get("constraints"),
                "models": [row.get("chonsen_model"), row.get("rejected_model")],
            },
        }
