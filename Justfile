# The habits of this project. `just` lists them.

_default:
    @just --list --unsorted

# Everything that a change must pass; migrations of real guests need root
test *arguments:
    ./tools/test {{arguments}}

# One integration test, or those whose names contain a word, with their output
lab-test name: programs
    cargo test --package farfault-integration --test all {{name}} -- --nocapture --test-threads 1

# Migrations of real guests with random accidents after the switchover (root; half a minute each)
accidents runs="20" seed="1": programs
    FARFAULT_ACCIDENT_RUNS={{runs}} FARFAULT_ACCIDENT_SEED={{seed}} \
        cargo test --package farfault-integration --test all accidents:: -- --nocapture

# Migrations of real guests over a link that is cut for so long, in pre-copy and in post-copy (root)
outages seconds="60": programs
    FARFAULT_OUTAGE_S={{seconds}} cargo test --package farfault-integration --test all outage:: -- --nocapture

# Unit and property tests only: seconds, no root
unit:
    cargo test --workspace --lib --bins

# Format, then lint
lint:
    cargo fmt --all
    cargo clippy --workspace --all-targets -- -D warnings

# The programs as the integration tests run them, with debug assertions
programs:
    cargo build --workspace --bins

# The programs, optimised
release:
    cargo build --release --workspace --bins

# A whole migration of a built-in guest over an emulated slow link, on this machine
demo *arguments:
    cargo run --release -- demo {{arguments}}

# An experiment of `farfault lab list`, or of a TOML file (root); paper and bytes need `just redis-guest` too
lab scenario *arguments: release guest
    target/release/farfault lab run {{scenario}} {{arguments}}

# A link between two new network namespaces, until Ctrl-D (root)
wan link="100Mbit,40ms": release
    target/release/wan --create --a left,10.0.0.1/30 --b right,10.0.0.2/30 --link {{link}}

# The guest of the tests: target/guest/{vmlinuz,initrd}
guest:
    ./tools/build-guest

# The same with a redis server: target/guest/initrd-redis, for `work = "redis"` (needs redis-tools)
redis-guest:
    ./tools/build-guest-with redis

# Benchmarks: `just bench --bench codec`, transport, stages, and as root bulk and faults
bench *arguments:
    cargo bench {{arguments}}

# Fuzzes a target of fuzz/ with libFuzzer until Ctrl-C, or as its arguments say
fuzz target *arguments:
    tools/fuzz {{target}} {{arguments}}

# Simulated migrations with failures at any moment, from a seed on (docs/testing.md)
simulate schedules="1000000" seed="0":
    FARFAULT_SIMULATE={{schedules}} FARFAULT_SEED={{seed}} \
        cargo test --release --lib session::simulation::no_schedule -- --nocapture

# Every order of a handover with two accidents: minutes
explore:
    cargo test --release --lib session::simulation::exhaustive -- --nocapture --include-ignored

# Documentation, as HTML
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --open
