//! What is done to one kind of study: imaging and inference composed into findings.
