"""Questions asked of the package, each answered by a script anyone can repeat: python -m benchmarks --help"""
