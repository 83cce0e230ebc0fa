"""The distribution of sinusoids, against curves that are fitted to its points."""

from __future__ import annotations

import numpy as np
import pytest

from metaxl_evo.long_horizon.sinusoid import Sinusoids


def test_a_task_is_one_curve_whose_points_train_judge_or_test() -> None:
    """y = a sin(x) + b cos(x), by least squares: amplitude and phase are of the paper's ranges (appendix G)."""
    tasks, seen = Sinusoids(seed=1, shots=10, test_points=20), []
    for task in range(50):
        parts = [tasks.train(task, 0), tasks.judge(task, 0), tasks.test(task)]
        x, y = (np.concatenate([part[name].double().numpy() for part in parts])[:, 0] for name in "xy")
        assert len(np.unique(x)) == 40
        assert -5 <= x.min() <= x.max() <= 5
        waves = np.stack([np.sin(x), np.cos(x)], axis=1)
        (a, b), *_ = np.linalg.lstsq(waves, y, rcond=None)
        assert waves @ [a, b] == pytest.approx(y, abs=1e-5)
        seen.append((np.hypot(a, b), np.arctan2(-b, a)))
    amplitudes, phases = np.array(seen).T
    assert 0.1 <= amplitudes.min() < 1 < 4 < amplitudes.max() <= 5
    assert 0 <= phases.min() < 0.6 < 2.5 < phases.max() <= np.pi
    assert (tasks.train(3, 0)["x"] == tasks.train(3, 29)["x"]).all()
    assert not (Sinusoids(seed=2).train(3, 0)["x"] == tasks.train(3, 0)["x"]).any()
