"""What pyproject.toml cannot say: the folder configs/ is installed as the package longlive.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["longlive*"]), "longlive.configs", "longlive.configs.miniature"],
    package_dir={"longlive.configs": "configs"},
)
