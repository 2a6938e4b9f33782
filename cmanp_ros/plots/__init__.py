"""
Pictures and files of a map, for `cmanp plot`. No ROS here.

    map -> `raster` -> `picture` (PNG, PDF, SVG), `geotiff`, `ply`

`watching` sees what is folded of a recording, for how well the bars hold; `style` has the looks
that all pictures share. Pictures need the package `matplotlib`, GeoTIFF `rasterio`.
"""
