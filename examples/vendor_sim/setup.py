from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension(
            "vendor_sim._C",
            ["csrc/all.cpp"],
            depends=[str(path) for path in Path("csrc").iterdir()],
            extra_compile_args=["-O1", "-g0", "-Wall"],  # quick to build: speed is no aim
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
