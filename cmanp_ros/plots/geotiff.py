"""A map as GeoTIFF, for QGIS and the like; needs the package `rasterio`."""

from pathlib import Path

import numpy as np

from cmanp_ros.optional import library
from cmanp_ros.plots.raster import Raster


def write(raster: Raster, path: Path, units: str = '') -> None:
    """
    Write mean and stddev as two bands; NaN is what was not observed.

    Positions are those of the map frame [m]: no coordinate reference system is set.

    :param units: of the field.
    """
    rasterio, grid = library('rasterio', f'writing {path}'), raster.grid
    west, north = grid.origin[0], grid.upper[1]
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        width=grid.width,
        height=grid.height,
        count=2,
        dtype='float32',
        nodata=np.nan,
        transform=rasterio.transform.from_origin(west, north, grid.resolution, grid.resolution),
        compress='deflate',
        predictor=3,
    ) as file:
        for band, name in enumerate(('mean', 'stddev'), start=1):
            file.write(getattr(raster, name)[::-1], band)
            file.set_band_description(band, name)
            file.set_band_unit(band, units)
