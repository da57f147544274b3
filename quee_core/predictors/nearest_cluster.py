"""The target table itself as a predictor: an image has the error rates of its nearest cluster (design, section 8)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from quee_core.clusters import Algorithm, Clustering, cluster
from quee_core.fixed_point import Standardizer
from quee_core.predictors.base import Options, Predictor
from quee_core.targets import group_sums


class NearestClusterOptions(Options):
    """Hyper-parameters of the target table."""

    clusters: int = Field(20, ge=1, description="K; the images of `target` must be as many.")
    shrinkage: float = Field(5.0, gt=0, description="n_0: images' worth of the overall rate in each cluster.")
    algorithm: Algorithm = Field("kmeans", description="kmeans, or minibatch for many images.")


class NearestClusterPredictor(Predictor):
    """Equation 3 without leaving anything out, since the image asked about is new: rates [K, P] by nearest centre.

    It discretises by itself, so its targets are the labels. Clustered targets would be shrunk a second time.
    """

    name: ClassVar[str] = "nearest_cluster"
    options_model: ClassVar[type[Options]] = NearestClusterOptions
    discretises: ClassVar[bool] = True

    options: NearestClusterOptions
    clustering: Clustering  # of standardised features
    rates: NDArray[np.float64]  # [K, P]

    @property
    def least_images(self) -> int:
        """K: a cluster is made of one image or more."""
        return self.options.clusters

    @property
    def macs(self) -> int:
        """Scaling, and the distance to every centre."""
        return self.features + self.clustering.centres.size

    def _fit(
        self,
        rows: NDArray[np.float64],
        targets: NDArray[np.float64],
        _validation: tuple[NDArray[np.float64], NDArray[np.float64]],
        seed: int,
        /,
    ) -> None:
        self.clustering = cluster(
            rows, self.options.clusters, self.options.algorithm, seed, Standardizer.identity(self.features)
        )
        assigned = self.clustering.assign(rows)
        sums = group_sums(targets, assigned, self.clustering.k)
        sizes = np.bincount(assigned, minlength=self.clustering.k)
        shrinkage = self.options.shrinkage
        self.rates = np.clip((sums + shrinkage * targets.mean(axis=0)) / (sizes[:, None] + shrinkage), 0.0, 1.0)

    def _predict(self, rows: NDArray[np.float64], /) -> NDArray[np.float64]:
        rates: NDArray[np.float64] = self.rates[self.clustering.assign(rows)]
        return rates

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"rates": self.rates, **{f"clustering.{k}": v for k, v in self.clustering.to_arrays().items()}}

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        prefix = "clustering."
        self.clustering = Clustering.from_arrays(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        )
        self.rates = np.asarray(arrays["rates"], np.float64)
