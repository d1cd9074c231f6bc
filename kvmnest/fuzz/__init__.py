"""Random near-valid VMCSs: does the kernel agree with the SDM's rules of VM entry?"""
