"""
What folding, refreshing and predicting cost, beside a plain implementation of the paper and GPs.

Every study yields records: `work`, `size`, `threads`, `implementation`, and what was measured,
`median_s` and `spread_s` (quartile to quartile) over repeated runs, `peak_bytes` beyond what the
process held before. Ratios of records of one run are what can be compared with other machines.
"""
