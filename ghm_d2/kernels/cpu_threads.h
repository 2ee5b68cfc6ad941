/* Sharing the rows out to threads, and writing to new memory. */

#ifdef __linux__
#include <sys/mman.h>
#endif
#if !defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <pthread.h>
#define PTHREADS
#endif

/* A pass over the rows of one part. */
typedef void (*pass)(const job *j, int part);

/* The first row of a part. */
INLINE int64_t first_row(const job *j, int part) { return j->rows * part / j->parts; }

/* The tallies of a part. */
INLINE tally *tallies_of(const job *j, int part) {
    return j->tallies + (int64_t)part * (j->regions + 1) * COPIES;
}

#ifdef PTHREADS
/* Apple's compiler has no OpenMP. Threads are started anew for each pass. That is quick beside the
 * pass itself, as a part has 65,536 elements or more, and a fork loses no threads. */
typedef struct {
    pass run;
    const job *j;
    int part, started;
    pthread_t thread;
} portion;

static void *run_portion(void *given) {
    const portion *p = given;
    p->run(p->j, p->part);
    return NULL;
}

static void for_parts(pass run, const job *j) {
    portion *others = j->parts > 1 ? malloc((size_t)j->parts * sizeof *others) : NULL;
    for (int part = 1; others && part < j->parts; part++) {
        portion *p = &others[part];
        *p = (portion){.run = run, .j = j, .part = part};
        p->started = !pthread_create(&p->thread, NULL, run_portion, p);
    }
    run(j, 0);
    for (int part = 1; part < j->parts; part++)
        if (others && others[part].started)
            pthread_join(others[part].thread, NULL);
        else
            run(j, part);
    free(others);
}
#else
/* The threads of OpenMP that torch uses too, so that none waits for a core that another spins on;
 * without OpenMP one after another. */
static void for_parts(pass run, const job *j) {
#pragma omp parallel for num_threads(j->parts) if (j->parts > 1)
    for (int part = 0; part < j->parts; part++) run(j, part);
}
#endif

/* Asks the system for large pages. An array this large is new memory each time, and getting it in
 * small pages takes longer than filling it. */
static void before_writing(void *out, size_t bytes) {
#ifdef MADV_HUGEPAGE
    size_t page = 2 << 20, begin = ((size_t)out + page - 1) / page * page;
    size_t end = ((size_t)out + bytes) / page * page;
    /* up to 32 MiB, malloc has memory that was written before */
    if (bytes > (32 << 20)) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)out, (void)bytes;
#endif
}
