# The KVM guest: one boot sector that changes one byte in each page of a range of memory, again and again.
#
# After QEMU's migration test (tests/migration/i386/a-b-bootblock.S): 32-bit protected mode without paging, which runs even
# where KVM is para-virtual and stock kernels do not boot. At any moment every page's byte equals its predecessor's, or is one
# less after exactly one edge: the place where the guest stopped. Serial line (COM1): 'A' at the start, 'B' after each pass, 'E'
# and a halt when a byte is not what the last pass left there.
#
#   as --32 boot.S -o boot.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary boot.o -o boot.img
#
# Whoever writes the image may change the two numbers behind the mark (see tests/src/guest/image.rs).

        .code16
        .globl  _start
_start:
        cli
        ljmp    $0, $1f
mark:   .ascii  "FERRY:)\n"
last:   .long   100 << 20               # end of the range, bytes; it begins at 1 MiB
spins:  .long   0                       # PAUSE instructions after each page: slows the guest down
1:
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              # A20 gate
        orb     $2, %al
        outb    %al, $0x92
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x3f8, %dx
        movb    $'A', %al
        outb    %al, %dx

        movl    $0x100000, %edi
clear:  movb    $0, (%edi)
        addl    $4096, %edi
        cmpl    last, %edi
        jb      clear

        xorl    %ebx, %ebx              # %bl: what the last pass left in every page
pass:   movl    $0x100000, %edi
page:   cmpb    %bl, (%edi)
        jne     wrong
        incb    (%edi)
        movl    spins, %ecx
        jecxz   2f
3:      pause
        decl    %ecx
        jnz     3b
2:      addl    $4096, %edi
        cmpl    last, %edi
        jb      page
        incb    %bl
        movb    $'B', %al
        outb    %al, %dx
        jmp     pass

wrong:  movb    $'E', %al
        outb    %al, %dx
halt:   hlt
        jmp     halt

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      # code, flat 4 GiB
        .quad   0x00cf92000000ffff      # data, flat 4 GiB
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55
