//! The usual mistakes with tenants do not compile: each file of `compile_fail/` is some of them, beside what
//! the compiler says. `TRYBUILD=overwrite` writes that anew, for a new compiler. What these types are for
//! compiles: the examples in `scope` and the functions.

#[test]
fn the_usual_mistakes_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
