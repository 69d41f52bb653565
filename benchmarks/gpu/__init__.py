"""Everything that is left to a machine with a GPU: parity, milliseconds, memory and whole runs, as JSON.

    benchmarks/gpu.sh OUT.json               everything, in one go; run again, it goes on where it ended
    benchmarks/gpu.sh OUT.json --rehearse    the same code at tiny width on the CPU, which measures nothing of a GPU
    python -m benchmarks.gpu.table OUT.json  what was measured, as Markdown

Each job is a process of its own and adds its results to the file one by one, so that a crash, an interruption or a
library that is missing costs no other result. What could not run says why.
"""
