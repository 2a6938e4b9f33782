// Asks a running node for the field at two locations. Prints a line for each, with mean and
// standard deviation of a reading there, such as
//
//     (1, 2): 12.31 +- 0.42
#include <chrono>
#include <cstdio>
#include <memory>

#include "cmanp_ros/srv/predict.hpp"
#include "rclcpp/rclcpp.hpp"

int main(int argc, char ** argv)
{
  rclcpp::init(argc, argv);
  auto node = rclcpp::Node::make_shared("example_client");
  auto client = node->create_client<cmanp_ros::srv::Predict>("cmanp/predict");
  auto request = std::make_shared<cmanp_ros::srv::Predict::Request>();
  request->header.frame_id = "map";
  request->dim_x = 2;
  request->x = {1.0F, 2.0F, 3.0F, 4.0F};  // [m] two locations
  if (!client->wait_for_service(std::chrono::seconds(5))) {
    std::fprintf(stderr, "nobody answers cmanp/predict: run cmanp doctor\n");
    return 1;
  }
  auto future = client->async_send_request(request);
  if (rclcpp::spin_until_future_complete(node, future) != rclcpp::FutureReturnCode::SUCCESS) {
    return 1;
  }
  const auto response = future.get();
  if (!response->success) {
    std::fprintf(stderr, "%s\n", response->message.c_str());
    return 1;
  }
  for (size_t n = 0; n < response->prediction.mean.size(); ++n) {
    std::printf(
      "(%g, %g): %.2f +- %.2f\n", request->x[2 * n], request->x[2 * n + 1],
      response->prediction.mean[n], response->prediction.stddev[n]);
  }
  rclcpp::shutdown();
  return 0;
}
