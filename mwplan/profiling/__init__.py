"""What each way of handling each layer costs.

Measured, or estimated from a device's figures. Imports `execution` and below.
"""
