"""
The demo: a simulated rover, the node and an observer, three processes that meet only over DDS.

`terrain` and `drive` are pure functions of a `Scenario`; `rover` and `observer` are the processes
around them, `processes` starts and stops them, `view` and `picture` show what they measured.
"""
