pytest_plugins = ["tests.localcluster.plugin"]
