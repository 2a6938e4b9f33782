"""
Ask a running node for the field at two locations, with plain rclpy.

    python3 examples/client.py

Prints a line for each, with mean and standard deviation of a reading there, such as

    (1.0, 2.0): 12.31 +- 0.42
"""

import rclpy
from cmanp_ros.srv import Predict


def main():
    """Call the service ~/predict of the node `cmanp` once."""
    rclpy.init()
    node = rclpy.create_node('example_client')
    client = node.create_client(Predict, 'cmanp/predict')
    request = Predict.Request(dim_x=2, x=[1.0, 2.0, 3.0, 4.0])  # [m] two locations
    request.header.frame_id = 'map'
    if not client.wait_for_service(timeout_sec=5):
        raise SystemExit('nobody answers cmanp/predict: run cmanp doctor')
    future = client.call_async(request)
    rclpy.spin_until_future_complete(node, future)
    response = future.result()
    if not response.success:
        raise SystemExit(response.message)
    for n, mean in enumerate(response.prediction.mean):
        x = tuple(request.x[2 * n : 2 * n + 2])
        print(f'{x}: {mean:.2f} +- {response.prediction.stddev[n]:.2f}')


if __name__ == '__main__':
    main()
