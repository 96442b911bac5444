"""The network in the clear, step by step as the plan has it: what the encrypted engines are compared with."""
