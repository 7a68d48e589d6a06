"""Run configs: one Python file a run, loaded by name by `alignjax.config`."""
