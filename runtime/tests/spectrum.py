"""The published way to forecast outputs, Spectrum (arXiv 2603.01623), written out by itself in float64."""

from __future__ import annotations

import numpy as np

DEGREE, RIDGE, MIX = 4, 0.1, 0.5
"""Its own settings for SDXL."""


class Spectrum:
    """Chebyshev polynomials by ridge regression on the outputs so far, mixed with a line through the last two.

    Args:
        total: evaluations of the run.
        kept: outputs that are remembered; the published code remembers all.
    """

    def __init__(self, total: int, kept: int = 6) -> None:
        self.total, self.kept = total, kept
        self.numbers: list[int] = []
        self.outputs: list[np.ndarray] = []

    def update(self, number: int, output: np.ndarray) -> None:
        self.numbers = [*self.numbers, number][-self.kept :]
        self.outputs = [*self.outputs, np.asarray(output, np.float64)][-self.kept :]

    def predict(self, number: int) -> np.ndarray:
        def features(n: int) -> np.ndarray:
            angle = np.arccos(2 * n / self.total - 1)
            return np.cos(angle * np.arange(DEGREE + 1))  # T_m(cos a) = cos(m a)

        design = np.stack([features(n) for n in self.numbers])
        factor = np.linalg.cholesky(design.T @ design + RIDGE * np.eye(DEGREE + 1))
        targets = np.stack([output.ravel() for output in self.outputs])
        coefficients = np.linalg.solve(factor.T, np.linalg.solve(factor, design.T @ targets))
        curve = (features(number) @ coefficients).reshape(self.outputs[0].shape)
        slope = (self.outputs[-1] - self.outputs[-2]) / (self.numbers[-1] - self.numbers[-2])
        line = self.outputs[-1] + slope * (number - self.numbers[-1])
        return MIX * curve + (1 - MIX) * line
