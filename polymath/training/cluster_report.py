"""What was found: the clusters of a run as numbers (JSON) and as one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ClusterFindings", "cluster_findings", "write_cluster_report"]

HTML_FILE = "report.html"
JSON_FILE = "report.json"
TEMPLATE = Path(__file__).with_name("cluster_report.html.j2")
TYPICAL = 5
"""Examples shown of each cluster."""
EXCERPT = 200
MAP_SIDE = 360
MOST_POINTS = 1500

ClusterFindings = dict[str, Any]


def cluster_findings(
    texts: Sequence[str],
    gradients: NDArray[np.float32],
    embeddings: NDArray[np.float32],
    members: NDArray[np.int64],
    centroids: NDArray[np.float32],
    labels: Sequence[str] | None,
) -> ClusterFindings:
    """Sizes, purity, typical examples and maps.

    Args:
        gradients: [texts, dimensions]; embeddings: of the same texts by the sentence encoder.
        labels: what the clusters are compared with, if anything is known.
    """
    import numpy as np

    cosines = (gradients * centroids[members]).sum(axis=1)
    clusters = []
    for index in range(len(centroids)):
        mine = np.flatnonzero(members == index).tolist()
        typical = sorted(mine, key=lambda row: -cosines[row])[:TYPICAL]
        clusters.append(
            {
                "size": len(mine),
                "similarity": round(float(cosines[mine].mean()), 4),
                "typical": [texts[row][:EXCERPT] for row in typical],
                "labels": _counts([labels[row] for row in mine]) if labels else {},
            }
        )
    return {
        "rows": len(texts),
        "clusters": clusters,
        "nmi": _nmi(labels, members) if labels else None,
        "maps": {
            "gradients": _map(gradients, members),
            "embeddings": _map(embeddings, members),
        },
    }


def write_cluster_report(
    folder: Path, findings: Mapping[str, Any], losses: Mapping[str, Mapping[str, float]], title: str
) -> None:
    """Write `report.json` and `report.html`.

    Args:
        losses: cluster -> who answers -> loss a token on held-out conversations, in nats.
    """
    from jinja2 import Environment

    numbers = {key: value for key, value in findings.items() if key != "maps"} | {"losses": losses}
    text = json.dumps(numbers, indent=2, ensure_ascii=False)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, findings=findings, losses=losses, side=MAP_SIDE
    )
    (folder / HTML_FILE).write_text(html, encoding="utf-8")


def _counts(labels: Sequence[str]) -> dict[str, int]:
    from collections import Counter

    return dict(Counter(labels).most_common())


def _nmi(labels: Sequence[str], members: NDArray[np.int64]) -> float:
    """Normalised mutual information: 0 for independent, 1 for the same partition."""
    from sklearn.metrics import normalized_mutual_info_score

    return round(float(normalized_mutual_info_score(list(labels), members)), 4)


def _map(
    vectors: NDArray[np.float32], members: NDArray[np.int64]
) -> list[tuple[float, float, int]]:
    """The two directions of most variance, scaled to the unit square: x, y, cluster."""
    import numpy as np
    from sklearn.decomposition import PCA

    some = np.random.default_rng(0).permutation(len(vectors))[:MOST_POINTS]
    if len(some) < 2:
        return []
    flat = PCA(2, svd_solver="randomized", random_state=0).fit_transform(vectors[some])
    flat -= flat.min(axis=0)
    flat /= np.maximum(flat.max(axis=0), 1e-12)
    return [
        (round(float(x), 3), round(float(y), 3), int(members[row]))
        for (x, y), row in zip(flat, some, strict=True)
    ]
