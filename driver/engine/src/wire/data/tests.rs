//! Data streams over real TCP.
