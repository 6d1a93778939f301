"""Certificates: is blending this model exact where it must be, and good enough elsewhere?

    exactness -> calibrate -> verdict -> file

`blend.certificate` is what comes out; `lookup` finds it again when a service starts.
"""
