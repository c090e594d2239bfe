"""Expert parallelism. The planning modules are pure functions of integers. A trainer uses `ExpertParallel`."""
