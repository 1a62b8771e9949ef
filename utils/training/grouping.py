"""Stage 2: users with similar interests into C groups, by k-means on the global model's user vectors; or at random."""
import warnings

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits


def kmeans_groups(user_vectors: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    """Each user's group, 0..C-1, [users], by k-means: at most 100 iterations, the best of 10 seeded starts.

    `user_vectors` are those of real users, [users, hidden], at least C, which reading the data checks.
    """
    kmeans = KMeans(num_groups, max_iter=100, n_init=10, random_state=seed)
    # One thread: several sum in the order in which they finish, so the last bits would differ from run to run.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct users than groups: some groups stay empty
        return kmeans.fit_predict(user_vectors.astype(np.float64)).astype(np.int64)


def random_groups(num_users: int, num_groups: int, seed: int) -> np.ndarray:
    """Groups of equal size (but for one user) at random, for comparison, [users]."""
    return np.random.default_rng(seed).permutation(np.arange(num_users) % num_groups)
