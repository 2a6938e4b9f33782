"""
Recordings: bags, CSV files and point lists, read as a node would have heard them. No ROS here.

    file -> messages -> sources -> transforms -> thinning -> `Chunk`

Bags need the package `rosbags`, binary LAS files `laspy`.
"""

from cmanp_ros.recordings.parts import Chunk
from cmanp_ros.recordings.recording import Recording

__all__ = ['Chunk', 'Recording']
