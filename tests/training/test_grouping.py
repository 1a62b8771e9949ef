"""Users are grouped by k-means: clear groups are found, the same ones each time."""
import numpy as np

from utils.training.grouping import kmeans_groups


def test_kmeans_finds_clear_groups_and_the_same_ones_each_time():
    random = np.random.default_rng(0)
    centres, truth = random.normal(0, 10, (4, 6)), random.integers(0, 4, 200)
    vectors = (centres[truth] + random.normal(0, 0.1, (200, 6))).astype(np.float32)
    groups = kmeans_groups(vectors, 4, seed=0).tolist()
    assert groups == kmeans_groups(vectors, 4, seed=0).tolist()
    assert sorted(set(groups)) == [0, 1, 2, 3]
    assert len(set(zip(groups, truth.tolist()))) == 4  # every group is one blob
    assert set(kmeans_groups(np.eye(8, dtype=np.float32), 8, seed=0)) == set(range(8))  # as many groups as users
