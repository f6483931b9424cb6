/* Hides AVX-512 and AVX-VNNI from libraries that ask CPUID, so that they take their AVX2 kernels.
 *
 *     gcc -O2 -shared -fPIC -o avx2.so benchmarks/avx2.c; LD_PRELOAD=$PWD/avx2.so python -m ...
 *
 * CPUID is made to fault (arch_prctl, on Linux and processors that can); the handler runs it and clears bits. Threads
 * inherit the setting, and programs that are started load this again.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static void on_fault(int number, siginfo_t *info, void *given) {
    greg_t *r = ((ucontext_t *)given)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0xa2) { /* not CPUID */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    unsigned leaf = r[REG_RAX], sub = r[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, sub, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && sub == 0) {
        b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
        c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
        d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
    }
    if (leaf == 7 && sub == 1)
        a &= ~(1u << 4 | 1u << 5), d &= ~(1u << 4 | 1u << 5 | 1u << 10 | 1u << 19);
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0))
        perror("CPUID cannot be made to fault");
}
