"""Build of finecf; the compiled layer comes with CMakeLists.txt."""

from setuptools import setup

setup()
