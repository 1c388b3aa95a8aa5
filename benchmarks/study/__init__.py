"""What α does, on tasks whose answers a program checks: python -m benchmarks.study"""
