"""
The page of `cmanp view`: what a running node maps, in a browser, without RViz.

    ~/field, ~/status, inputs -> listener (ROS) -> packing -> server (web socket) -> page.html
"""
