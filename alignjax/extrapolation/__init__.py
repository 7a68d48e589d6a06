"""What `alignjax.expo` does: theta + alpha (theta - theta_sft) over whole models."""
