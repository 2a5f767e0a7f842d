//! Instances to a volume or a rejection, slice by slice, by geometry.
