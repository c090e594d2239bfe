"""Expert parallelism. The planning modules are pure functions of integers; `ExpertParallel` is what a trainer uses."""
