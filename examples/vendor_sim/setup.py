from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = ["driver", "plugin", "faults", "dispatch", "ops"]

setup(
    ext_modules=[
        CppExtension(
            "vendor_sim._C",
            [f"csrc/{name}.cpp" for name in SOURCES],
            extra_compile_args=["-O1", "-g0", "-Wall"],  # quick to build: speed is no aim
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
