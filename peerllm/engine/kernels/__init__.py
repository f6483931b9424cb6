"""Matrices in the form that this device multiplies fastest, behind one seam: `packing.Packing` while a shard is loaded.

Which form: `forms.choose`. A form is a `Form`; of a run of a matrix's rows it makes a `Part`, a callable.
"""
