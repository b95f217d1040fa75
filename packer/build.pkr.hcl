build {
  name    = "workspace"
  sources = ["source.null.tree", "source.qemu.machine"]

  provisioner "ansible" {
    playbook_file = var.playbook
    command       = var.ansible_playbook
    user          = "root"
    use_proxy     = false
    groups        = ["workspaces"]
    ansible_env_vars = [
      "ANSIBLE_HOST_KEY_CHECKING=True",
      "ANSIBLE_PIPELINING=True",
      "ANSIBLE_FORCE_COLOR=0",
    ]
    extra_arguments = [
      "--ssh-extra-args", "-o UserKnownHostsFile=${var.known_hosts_file} -o StrictHostKeyChecking=yes -o HostKeyAlias=${var.host_key_name}",
      "--extra-vars", "ansible_python_interpreter=${var.python_interpreter}",
      "--extra-vars", "saw_runtime_wheelhouse=${var.wheelhouse}",
      "--extra-vars", "sandbox_mcp_servers=${var.mcp_servers}",
      "--extra-vars", "workspace_converge_image=true",
      "--extra-vars", "workspace_converge_baseline=${var.baseline}",
      "--extra-vars", "@${var.edr_variables}",
      "--extra-vars", "workspace_converge_patching=${var.patching}",
      "--extra-vars", "workspace_converge_gpu=${var.image_variant == "gpu"}",
      "--extra-vars", "workspace_converge_root_verity=${var.root_verity}",
      "--extra-vars", "gpu_driver_module_key=${var.module_key}",
      "--extra-vars", "gpu_driver_module_certificate=${var.module_certificate}",
    ]
  }

  # Served by a light host, the tree is here already.
  provisioner "shell-local" {
    only = ["null.tree"]
    environment_vars = [
      "SECURE_BOOT_KEY=${var.secure_boot_key}",
      "SECURE_BOOT_CERTIFICATE=${var.secure_boot_certificate}",
    ]
    inline = [
      "${var.python} -m saw.image.build assemble --root ${var.root_tree} --output ${var.output} --seed ${var.seed} --root-verity=${var.root_verity} --secure-boot-key \"$SECURE_BOOT_KEY\" --secure-boot-certificate \"$SECURE_BOOT_CERTIFICATE\"",
    ]
  }

  # A machine's tree is taken from its disk once it is off; the image is made of it in the same way.
  post-processor "shell-local" {
    only = ["qemu.machine"]
    environment_vars = [
      "SECURE_BOOT_KEY=${var.secure_boot_key}",
      "SECURE_BOOT_CERTIFICATE=${var.secure_boot_certificate}",
    ]
    inline = [
      "${var.python} -m saw.image.build assemble --machine-disk ${var.machine_output}/machine.qcow2 --root ${var.root_tree} --output ${var.output} --seed ${var.seed} --root-verity=${var.root_verity} --secure-boot-key \"$SECURE_BOOT_KEY\" --secure-boot-certificate \"$SECURE_BOOT_CERTIFICATE\"",
    ]
  }
}
