"""
Accuracy on stored tasks, beside what others would use: no ROS, and no torch but for our model.

`windows`, `robust` and `tracks` make or read tasks, `peers` are the methods to stand beside,
`scores` compares, `cache` keeps slow predictions, `studies` runs it all and `tile_size` answers
the one question that a user has to: how large tiles should be.

Everywhere, a method for one task is a function `(x, y, x_target) -> mean, stddev`, and a method
for a stream is an object with `observe(x, y)` and `predict(x) -> mean, stddev`; x is (n, 2), all
else (n,) or (n, 1), and stddev is that of an observation, noise included.
"""
