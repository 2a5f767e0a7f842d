//! NIfTI-1 and NIfTI-2, 3-D and 4-D, plain and gzipped, in and out.
