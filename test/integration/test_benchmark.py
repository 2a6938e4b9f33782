"""The benchmark's robot drives for a real node over DDS, and what it reports adds up."""

from cmanp_ros.benchmark import node, soak


def test_robot_is_answered_and_everything_is_counted(monkeypatch):
    monkeypatch.setattr(node, 'DURATION_SEC', 4.0)
    monkeypatch.setattr(node, 'NUM_POINTS', (20,))
    (record,) = node.over_dds(1)
    assert record['clouds'] in range(30, 42)
    assert record['messages_folded'] + record['messages_dropped'] <= record['clouds']
    assert record['points_folded'] > 0
    assert 0 < record['answers'] <= record['queries']
    assert 0 < record['median_s'] <= record['p99_s']
    assert record['age_median_s'] > 0
    assert record['grids'] > 0


def test_soak_samples_the_memory_of_the_node(monkeypatch):
    monkeypatch.setattr(soak, 'SAMPLES', 8)
    monkeypatch.setattr(soak, 'NUM_POINTS', 20)
    records = list(soak.soak(6.0))
    assert len(records) == 8
    assert all(record['peak_bytes'] > 50e6 for record in records)
    assert 'growth_bytes_per_min' in records[-1]
