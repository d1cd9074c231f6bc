"""What it takes to run cases, whoever runs them: pytest with the plugin, or the light runner.

Nothing here imports pytest.
"""
