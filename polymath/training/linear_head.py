"""The head of a router: logistic regression on unit vectors, centres beside it, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polymath.router import RouterHead, calibrated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["find_centres", "fit_head", "fit_temperature", "out_of_fold_logits"]

FOLDS = 5
CENTRES = 128
"""Of a class at most."""
SAME_VECTOR_DIGITS = 4
BATCH = 2048
LEAST_NORM = 1e-12


def fit_head(
    vectors: NDArray[np.float32],
    targets: NDArray[np.int64],
    weights: NDArray[np.float64],
    inverse_regularisation: float,
) -> RouterHead:
    """Multinomial logistic regression.

    Args:
        weights: [rows], how much each row counts; their mean should be 1.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    head: Any = LogisticRegression(C=inverse_regularisation, max_iter=1000)
    head.fit(vectors, targets, weights)
    weight, bias = head.coef_, head.intercept_
    if len(weight) == 1:  # two classes come as one row from scikit-learn
        weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    return RouterHead(weight.astype(np.float32), bias.astype(np.float32))


def find_centres(
    vectors: NDArray[np.float32], targets: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Centres of each class' prompts by K-means, [centres, dimensions], and whose they are."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    centres, owners = [], []
    for target in range(int(targets.max()) + 1):
        members = vectors[targets == target]
        distinct = len(np.unique(members.round(SAME_VECTOR_DIGITS), axis=0))
        means = MiniBatchKMeans(
            min(CENTRES, distinct), n_init=1, batch_size=BATCH, random_state=seed
        ).fit(members)
        centres.append(means.cluster_centers_)
        owners += [target] * len(means.cluster_centers_)
    found = np.concatenate(centres).astype(np.float32)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), LEAST_NORM)
    return found, np.array(owners, dtype=np.int64)


def out_of_fold_logits(
    vectors: NDArray[np.float32],
    targets: NDArray[np.int64],
    weights: NDArray[np.float64],
    inverse_regularisation: float,
    centred: bool,
    seed: int,
) -> NDArray[np.float32]:
    """Logits of every row from a head that has not seen it, [rows, labels]."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, int(np.bincount(targets).min()))
    logits = np.empty((len(targets), int(targets.max()) + 1), dtype=np.float32)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(vectors, targets):
        head = fit_head(vectors[train], targets[train], weights[train], inverse_regularisation)
        if centred:
            head = head.with_centres(*find_centres(vectors[train], targets[train], seed))
        logits[test] = head.logits(vectors[test])
    return logits


def fit_temperature(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017)."""
    import numpy as np
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        probabilities = calibrated(logits, float(np.exp(log_temperature)))
        return -float(np.log(probabilities[rows, targets] + 1e-12).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-6.0, 6.0), method="bounded").x))
