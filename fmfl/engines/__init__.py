"""Other engines that the same study runs on; what they need is an extra of this package."""
