"""Compiles the kernels for chips that are not there, by the accelerator's own compiler, and tells what came of it.

    PYTHONPATH=.aot/tpu python -m hsai_kernels.aot tpu --chips v5e v6e        one row of JSON a line

A platform is a module: gpu.py and tpu.py say which chips there are and how to compile for one, gpu_cases.py and
tpu_cases.py which programs. runner.py compiles them, in a process of its own: scripts/install_aot.sh puts the compilers
that pins.py lists into folders of their own, since in the virtual environment they would change how jax starts for
every program.
"""
